"""Names under which the weights of loss terms are kept in configurations and runs. Loads no torch."""

# Terms that a configuration has fields for. They come first in a sum.
NAMED = {"weight": "lambda_weight", "delta": "lambda_delta"}
# Before the name of any other term in the parameters of a run or of a point.
PREFIX = "terms."
