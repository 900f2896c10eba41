"""Studies: does pre-training help on a dataset, with how many labels, and how many labels does it save?"""
