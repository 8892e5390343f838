"""`sglang-stream report`: from rows to tables, figures and a page; pure functions up to the files.

load              row files, and what their manifests say
measures          what a cell's rows come to
table             a table, as Markdown and CSV
tables            those of cells that are compared with each other
beside_published  the one with the published figures
against_engine    the simulator against the engine
figures           one figure a comparison
timelines         one request, one worker
page              one HTML page of all of it
summary           the table that `replay` prints at its end
run               the command
"""
