"""What is asked of the model: functions from packed tasks and a way to score masks to plain numbers.

None imports another and none touches a file; `run.py` tells the story in order.
"""
