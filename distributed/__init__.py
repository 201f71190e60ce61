"""GPT-NeoX over several ranks. To read: sharding.py (who holds what), comm.py (what is exchanged), model.py (where)."""
