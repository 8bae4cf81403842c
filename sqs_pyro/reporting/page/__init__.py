"""Reports as one HTML file each, out of plain documents: of a run, of several runs, of a study, of a benchmark.

A page needs no network and no other file, and every text in it that somebody else has chosen is escaped. Its
script only sorts, filters, selects and shows: whatever it says is there without it, too.
"""
