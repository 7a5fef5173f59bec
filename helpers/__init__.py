"""What the notebooks share: data, networks, training, evaluation and Grad-CAM.

README.md lists the modules; each imports only from those above it.
"""
