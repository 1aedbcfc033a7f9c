# MLflow's server with its driver for Postgres, in the versions of requirements.lock.
FROM python:3.11.13-slim-bookworm
COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --constraint /tmp/requirements.lock mlflow "psycopg[binary]" \
    && useradd --create-home mlflow \
    && install --directory --owner=mlflow /artifacts
USER mlflow
