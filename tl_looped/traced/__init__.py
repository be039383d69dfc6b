"""Any module that calls its layers several times: its calls, what loops in them, and runs in which hooks act."""
