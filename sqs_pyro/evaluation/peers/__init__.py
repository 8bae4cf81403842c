"""Other ways to an uncertainty, on the network and data at hand: each returns a predictor that hears its draws.

Temperature scaling, the cheapest of them, is :mod:`sqs_pyro.evaluation.calibration`.
"""
