def write_report(folders, out): out.write_text("x")
