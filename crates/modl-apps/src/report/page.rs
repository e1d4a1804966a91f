//! A self-contained HTML page.

/// Text with HTML's special characters written out.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A page in the making: headings, paragraphs, tables and plots in order.
#[derive(Debug)]
pub(crate) struct Page {
    title: String,
    body: String,
}

impl Page {
    pub(crate) fn new(title: &str) -> Self {
        Page { title: escape(title), body: String::new() }
    }

    pub(crate) fn heading(&mut self, text: &str) {
        self.body += &format!("<h2>{}</h2>\n", escape(text));
    }

    pub(crate) fn paragraph(&mut self, text: &str) {
        self.body += &format!("<p>{}</p>\n", escape(text));
    }

    pub(crate) fn table(&mut self, table: &super::Table) {
        self.body += &format!("<div class=wide>{}</div>\n", table.html());
    }

    /// A plot, inline.
    pub(crate) fn figure(&mut self, svg: &str, caption: &str) {
        let caption = escape(caption);
        self.body += &format!(
            "<figure><div class=wide>{svg}</div><figcaption>{caption}</figcaption></figure>\n"
        );
    }

    pub(crate) fn html(&self) -> String {
        let Page { title, body } = self;
        format!(
            "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\n\
             <meta name=viewport content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>{STYLE}</style></head>\n\
             <body><main><h1>{title}</h1>\n{body}</main></body></html>\n"
        )
    }
}

const STYLE: &str = "
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0}
main{max-width:1120px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0 0 12px}h2{font-size:20px;margin:32px 0 8px}
p{max-width:75ch}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 10px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #333}
figure{margin:16px 0}figcaption{color:#555;font-size:14px}
";
