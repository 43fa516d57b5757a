"""Networks of other papers, to be compared with."""
