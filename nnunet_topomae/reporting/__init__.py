"""Pictures, figures and tables of a pre-training run; nothing here knows a method."""
