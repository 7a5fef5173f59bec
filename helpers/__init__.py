"""What the notebooks share: data, networks, training, evaluation and Grad-CAM.

Read the modules in the order of their dependencies: config, shapes, data, models, training,
evaluation, gradcam, cam_metrics, runs, plots, notebooks.
"""
