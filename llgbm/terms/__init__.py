"""Loss terms: one file a term. `docs/terms.md` says how to add one."""
