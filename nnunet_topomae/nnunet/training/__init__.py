"""The two stages: what they share, pre-training, and fine-tuning."""
