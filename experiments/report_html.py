def html_page(made): return ""
