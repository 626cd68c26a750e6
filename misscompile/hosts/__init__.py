"""What a live module tree and a whole graph do differently, behind one interface: no other room knows which of the two it has.

`base.py` is the interface, `modules.py` and `graphs.py` are its two implementations.
"""
