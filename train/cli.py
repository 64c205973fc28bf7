"""The command `train-estimator`."""

from __future__ import annotations

from foreroute.estimators.console import one_line_errors, run_command


def main() -> None:
    """Entry point of `train-estimator`."""
    with one_line_errors("train-estimator"):
        from foreroute.train.command import train

        run_command("train-estimator", train)


if __name__ == "__main__":
    main()
