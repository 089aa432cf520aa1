"""Choose the next trial: from a list (`queue`) or drawn by Optuna (`points`)."""
