"""Takes the pictures of the Ray dashboard in this folder, by headless Chromium.

`python docs/take_screenshots.py`, with `playwright` from PyPI and Debian's chromium installed, while a platform runs
(`tunesmith up`) that has a job: reads where the dashboard is and its token from the settings.
"""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import sync_playwright

from tunesmith.settings import Settings

VIEWS = {"jobs": "-m trainers", "serve": "reconciler"}
"""Views by their place in the dashboard's URL, with a text that each must show."""


def main() -> None:
    settings = Settings.from_env()
    token = settings.ray_token_path.read_text().strip()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        context = browser.new_context(viewport={"width": 1400, "height": 860})
        context.add_cookies([{"name": "ray-authentication-token", "value": token, "url": settings.ray_jobs_url}])
        page = context.new_page()
        for view, text in VIEWS.items():
            page.goto(f"{settings.ray_jobs_url}/#/{view}")
            page.get_by_text(text).first.wait_for(timeout=60_000)
            page.screenshot(path=Path(__file__).with_name(f"ray-dashboard-{view}.png"))
        browser.close()


if __name__ == "__main__":
    main()
