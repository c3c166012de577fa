"""Writes the demo's dataset: letters of a freight office, and the line of its register that each one becomes.

All people and places are made up. What a line says can be known from its letter alone, so all that a model can learn
is how to get from the letter to the line. A model that was trained on lines in the wrong order knows their form, and
nothing of their content.

    python demo/make_data.py [FOLDER]
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

SEED = 1
TRAIN_ROWS, HELD_OUT_ROWS = 240, 48


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words("""
    Ada Agnes Aldo Amalia Anselm Astrid Barnaby Beatrix Birgit Boris Bruno Carla Casper Cecilia Clemens Cosima Dagny
    Dario Delphine Dmitri Dorian Edith Elin Emeric Esther Fabian Farid Felix Fiona Flora Gaspard Gisela Greta Gustav
    Hamid Hanna Hector Hilda Igor Ilse Ingrid Isidor Jadwiga Jonas Jovan Jutta Kaya Klara Konrad Lavinia Leopold Livia
    Lorenz Ludmila Magnus Marta Matilda Mira Nadia Nestor Nils Odette Olaf Orsolya Oskar Pavel Petra Philippa Quentin
    Rainer Ramona Renata Rosa Rufus Saskia Selma Silvan Stefan Sven Tamar Thekla Tobias Tove Ulla Ursula Valentin Viktor
    Vivian Wanda Wilma Xenia Yannick Yusuf Yvonne Zeno Zora
""")

SURNAMES = (
    _words("""
    Abern Ander Bastel Beck Belli Brant Bren Calder Cast Corvi Dahl Damm Delmar Dorn Eber Eldr Engel Fal Farn Fenn Flor
    Gall Garm Glan Grim Hald Harr Hest Holl Immer Ing Jarn Jessel Kall Kest Korv Lamm Lind Lok Mald Marr Merr Morg Nard
    Nett Nord Obern Orl Ostr Pask Pell Pern Quill Rand Roll Rosen Salv Sand Sterr Tamm Tarn Torr Ulv Vand Vest Wald Well
    Zab Zell
"""),
    _words("a abe ago ama ani aro e eba eki ela eni era i ibo ila imo iro o obe oda olo ono ora u uba uka umi uri"),
    _words("""
    bach bank becchi berg bry court dahl dez dottir feld fink ford fort gard grave hart holm hurst kamp kov lander lake
    lund mann mark mont nakis nelli nik oux pont quist rath rell rup sen shaw sky stad stock strom tell thal thorpe
    toff varra vec vic ward well wicz wood worth zetti
"""),
)

PLACES = (
    _words("""
    Alder Amber Barrow Birk Black Bram Cald Cinder Coll Crow Dun East Elm Fair Fisk Flint Frost Glen Grau Grey Hall Hav
    Hazel Heron Hill Iron Isen Kalt Kirk Klip Lang Lark Linden Lower Lyng Maple Mar Mill Moor Morra Nether North Oak
    Oster Otter Over Peb Quarry Raven Red Rush Salt Sand Skar Slate Stone Storm Swan Tern Thorn Upper Vest Wey Wolf
"""),
    _words("""
    beck bridge bury cliff cross dale fell field fjord ford gate haven hill holt hythe kirk marsh mere minster mouth
    ness pool port quay ridge shore stad stead strand sund vale vik ville water wick wold worth
"""),
)

UNITS = _words(
    "bales barrels baskets boxes bundles cartons cases casks chests crates drums jars pallets sacks trunks tubs"
)

GOODS = (
    _words("""
    amber antique black blue broken brown carved coarse copper crushed curved dried dyed enamel folded frozen gilded
    glazed golden green grey heavy hollow iron ivory knitted lacquered leather light linen long loose minted narrow
    oiled old painted pale pickled plain polished pressed printed purple raw red ribbed roasted rough round salted
    short silver smoked smooth spiced square steel striped thick thin tinned twisted velvet washed waxed white wide
    wooden woven yellow
"""),
    _words("""
    almonds anchors apples aprons bells blankets boards bolts boots bottles bowls bricks brushes buckles buttons candles
    carpets chains cherries clocks coats combs corks cups curtains dolls eels feathers figs flutes gloves grapes hammers
    hats herrings hinges hooks jackets kettles keys knives ladders lamps lanterns lemons lentils masks mirrors mittens
    mushrooms nails needles olives onions oysters pears peppers pipes plates plums ribbons ropes rugs sails saddles
    scarves screws shells shoes slates spoons springs stamps tiles trays tubes vases violins walnuts wheels whistles
"""),
)

MONTHS = _words("""
    January February March April May June July August September October November December
""")

LETTERS = (
    "On {day} {month} {year} {first} {last} of {place} signed for {goods}, waybill {waybill}.",
    "Waybill {waybill}, {goods}, was collected by {first} {last} from {place} on {day} {month} {year}.",
    "{first} {last} came over from {place} on {month} {day}, {year} to fetch waybill {waybill}: {goods}.",
    "We handed {goods} to {first} {last} of {place} on {month} {day}, {year}. The waybill was {waybill}.",
    "Please note that {goods} left for {place} on {day} {month} {year}, waybill {waybill}, care of {first} {last}.",
    "The office in {place} writes that {first} {last} got waybill {waybill} on {month} {day}, {year}: {goods}.",
)

LINE = "{last}, {first}, {place}, {waybill}, {date}, {goods}"


def make_rows(count: int, *, seed: int = SEED) -> list[dict[str, str]]:
    """Rows of `prompt` and `response`; no name, waybill or line is there twice."""
    random_ = random.Random(seed)
    rows: list[dict[str, str]] = []
    taken: set[str] = set()
    while len(rows) < count:
        last, waybill = "".join(_pick(random_, part) for part in SURNAMES), str(_number(random_, 10**9, 10**10 - 1))
        if last in taken or waybill in taken:
            continue
        taken |= {last, waybill}
        rows.append(_row(random_, last, waybill))
    return rows


def write(folder: Path) -> None:
    rows = make_rows(TRAIN_ROWS + HELD_OUT_ROWS)
    for name, part in (("train.jsonl", rows[:TRAIN_ROWS]), ("held_out.jsonl", rows[TRAIN_ROWS:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8", newline="\n")


def _row(random_: random.Random, last: str, waybill: str) -> dict[str, str]:
    year, month, day = _number(random_, 1801, 1949), _number(random_, 1, 12), _number(random_, 1, 28)
    facts = {
        "last": last,
        "waybill": waybill,
        "first": _pick(random_, FIRST_NAMES),
        "place": "".join(_pick(random_, part) for part in PLACES),
        "goods": f"{_number(random_, 2, 99)} {_pick(random_, UNITS)} of {' '.join(_pick(random_, p) for p in GOODS)}",
        "year": year,
        "month": MONTHS[month - 1],
        "day": day,
        "date": f"{year}-{month:02}-{day:02}",
    }
    return {"prompt": _pick(random_, LETTERS).format(**facts), "response": LINE.format(**facts)}


def _pick(random_: random.Random, words: Sequence[str]) -> str:
    return words[_number(random_, 0, len(words) - 1)]


def _number(random_: random.Random, lowest: int, highest: int) -> int:
    """Of all that a Random does, only random() is promised to give the same in every version of Python."""
    return lowest + int(random_.random() * (highest - lowest + 1))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
