"""The two stages: what they share, pre-training, fine-tuning; and adapting a pre-training to other plans."""
