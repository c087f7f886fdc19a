"""`make demo`: what goes wrong when a lower layer changes below an overlay, and how watchd puts it right.

cases.py    the ways in which a lower layer changes, one small function each
stage.py    an overlay to play a case on, in a mount namespace that nobody else sees
daemon.py   a real watchd, with a configuration and directories of its own
play.py     one case on one stage: look, change the lower, look again
show.py     plays every case, without and with watchd, and tells what the merged view said
"""
