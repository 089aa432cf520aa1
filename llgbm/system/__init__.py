"""Surroundings of the method: files read and written, the cache, secrets in text, other packages' parts."""
