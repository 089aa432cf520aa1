"""Commands of `python -m llgbm`, a module each: `add_parser(commands)` registers one."""
