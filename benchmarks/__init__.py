"""Programs that measure; each writes its last run to `results/`, on a clean commit (docs/contracts.md, section 10)."""
