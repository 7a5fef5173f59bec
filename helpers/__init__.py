"""What the notebooks share: data, models, training, evaluation, class activation maps."""
