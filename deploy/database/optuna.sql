-- Optuna's studies and the claims of runs: tracking.studies=postgresql://minilm@127.0.0.1:5432/optuna
CREATE DATABASE optuna;
