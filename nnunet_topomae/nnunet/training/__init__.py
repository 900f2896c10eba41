"""The trainers of both stages, pre-training and fine-tuning, and what they share."""
