"""How a bundle comes to be: data, training, calibration, evaluation, export."""
