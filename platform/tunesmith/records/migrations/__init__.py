"""The schema of the record store, version by version; run by `RecordStore.migrate`."""
