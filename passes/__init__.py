"""The passes, one or one finder a file. Import them as `misscompile.passes.<file>`."""

if __name__ == "passes":
    raise ImportError("import misscompile.passes: under the bare name `passes` every class would exist twice")
