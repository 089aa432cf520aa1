"""Settings of a process of our own, driver or worker. Import it before all else, and nowhere in a library's code.

Libraries make 680,000 objects that stay, and looking for garbage among them every 700 objects takes a fifth of the
time that they take to load.
"""

import gc

gc.set_threshold(50_000)
