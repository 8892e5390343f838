"""`sglang-stream report`: from rows to tables, figures and a page; pure functions up to the files.

load       row files, and what their manifests say
measures   what a cell's rows come to
tables     the tables, as Markdown and CSV
figures    one figure a comparison
timelines  one request, one worker
page       one HTML page of all of it
summary    the table that `replay` prints at its end
run        the command
"""
