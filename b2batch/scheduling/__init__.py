"""Manifests that run a job on a schedule: of cron, systemd, Kubernetes, Slurm and Airflow. Text only."""
