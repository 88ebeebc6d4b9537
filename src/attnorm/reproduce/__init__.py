"""Every table of the paper from one command: which runs it takes, what they will cost, and the doing of it.

    DIR/runs/an-s0/       a run of each row and seed, as `attnorm train` makes them, with its scores
    DIR/manifest/         Table 3: the frozen test set
    DIR/estimate.json     what an image costs on each device, measured once
    DIR/failed.json       runs that collapsed, and how: they are not tried again

Tables 1, 2 and 4 of one scale share their runs where they are made in one folder.
"""
