"""A discrete-event simulator of workers that serve streams.

    events     the clock and what is due
    pool       KV tokens: free, cached, locked, evicted
    holdings   what the streams of a worker hold, and their order
    table      what chunks and seals do to them
    batches    which prefill slices make up an iteration
    worker     one prefill or unified worker: its queue and its iterations
    decode     a decode worker
    clients    who asks, in one of the modes
    cluster    requests from their arrival to their answer, placement and transfers
    timeline   what happens meanwhile, and the part of it that is kept
    rows       a cell as the rows that the runner writes
    run        the command `sglang-stream simulate`

Policies, order, planner, predictor and placement are the product's own objects; the rest follows
its engine adapter (`sglang_stream/engine`) step by step, with lengths in place of tokens.
"""
