"""What a live module tree and a whole graph do differently, behind one interface. No other room knows which one it has.

`base.py` is the interface, `modules.py` and `graphs.py` are its two implementations.
"""
