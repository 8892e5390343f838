"""`sglang-stream replay`: the cells of a specification on a real engine.

clients    one request by the SDK, by waiting or by re-sending
load       one cell: warm-up, empty caches, all requests at their times, rows
ledger     the rows of a run that may break off and go on
run        the command
"""
