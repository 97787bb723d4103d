"""Landmark image retrieval: the parts that the notebooks join. Each module is one idea."""
