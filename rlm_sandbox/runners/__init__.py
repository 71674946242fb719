"""Guest-side programs: launcher, zygote, supervisor, worker. Standard library and ``wire``, ``context``, ``confine`` only.

These files are bundled into one archive and run inside the isolation, on whatever Python is there.
"""
