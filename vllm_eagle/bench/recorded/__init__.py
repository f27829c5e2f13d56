"""Trees recorded once (record.py), and what they say of other hardware: simulate.py, replay.py."""
