"""A landmark network that finds the same place in the images of other patients (SAM: Yan et al., IEEE TMI 2022)."""
