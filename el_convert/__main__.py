"""`python -m el_convert` does the same as `el-convert`."""

from el_convert.cli import main

if __name__ == "__main__":
    main(prog_name="python -m el_convert")
