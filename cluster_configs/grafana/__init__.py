"""Grafana dashboards: panels as data, JSON generated from them."""
