"""The page of one run or several: one file that needs no network and no server."""
