"""`python -m engine.demo.training`: the training command without the service's packages (a bare GPU machine has none)."""

from engine.demo.training.command import main

if __name__ == "__main__":
    main()
