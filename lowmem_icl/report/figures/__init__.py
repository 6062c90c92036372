"""Figures for papers, drawn from the tables of a run alone."""
