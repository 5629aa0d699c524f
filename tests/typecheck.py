"""The type checker of the suite: beartype, taking an int where a float is annotated, as Python does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
