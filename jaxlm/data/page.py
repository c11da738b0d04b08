NAME = "report.html"
def html(report): return ""
