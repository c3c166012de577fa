"""The contestants of `benchmarks.cpu_lora`, a program each: `python -m benchmarks.peers.NAME WORK.json [SETTING]`."""
