"""Every word of the pages, in English and in Chinese."""

from __future__ import annotations

EN = {
    "title": "Judge answers", "home": "Home", "chat": "Chat", "queues": "To judge", "judge": "Judge",
    "done": "Done", "nothing": "Nothing left to judge here. Thank you.", "mine": "by you", "of": "of",
    "at_most": "of at most",
    "look": "Look", "admin": "Admin", "undo": "Undo last", "skip": "Skip", "save": "Save", "say": "Send",
    "message": "Your message", "new_chat": "New chat", "again": "Another answer", "answer": "Answer",
    "edit": "Edit", "edit_send": "Send the edited message", "user": "User", "assistant": "Assistant",
    "system": "System", "left_better": "A is better", "right_better": "B is better", "tie": "Equally good",
    "both_bad": "Both bad", "rank_hint": "1 is the best; equal numbers are ties.", "place": "Place",
    "mark_hint": "Select text in the answer, then choose a label. Save without a mark if nothing is wrong.",
    "mark_keys": "By keyboard: Tab into the answer, arrows move, Shift and arrows select.",
    "marks": "Marks", "clear": "Clear marks", "accept": "Accept", "reject": "Reject",
    "correction": "A better answer (optional)", "up": "Good answer", "down": "Bad answer",
    "reasons": "Why (optional)", "r_wrong": "not correct", "r_unclear": "unclear", "r_unsafe": "harmful",
    "r_style": "style", "r_helpful": "helpful", "login": "Log in", "logout": "Log out", "name": "Name",
    "password": "Password", "wrong": "Name or password is wrong.", "change_name": "Change name",
    "who": "Judging as", "language": "中文", "no_model": "No model answers here; judge the queues.",
    "no_answer": "There is no answer yet.", "compare_hint": "Which answer is better?",
    "retry": "Not saved yet: the connection is lost. Trying again…",
    "lost": "No answer came: the connection is lost, or the server failed. Your text is still here; send it again.",
    "away": "The database does not answer at the moment, so nothing was saved. Try again in a moment.",
    "logged_out": "You are no longer logged in, and this was not saved. Log in in another tab, then send it again.",
    "search": "Search", "rater": "Rater",
    "task": "Task", "seconds": "Seconds (median)", "gold": "Gold right", "drift": "First half / second half",
    "thinking": "The model is answering…", "busy": "Too many requests; wait.", "error": "This did not work",
    "all": "All", "count": "Judgements", "forget": "Forget", "skip_main": "To the content",
    "alpha": "Agreement (Krippendorff's alpha, 95% interval)", "items": "Items",
    "conversations": "Conversations", "runs": "Runs", "run": "Run", "step": "Step", "tables": "Tables",
    "beside": "Side by side", "beside_pick": "Pick", "behind": "A number that is a link leads to the rows behind it.",
    "all_numbers": "All numbers of this run", "no_rows": "Nothing matches.", "prompt": "Prompt",
    "rate_hint": "A number key answers the first line that is still open.", "select_first": "Select some text first.",
    "review_hint": "Is this answer good? If not, you may write a better one before you reject it.",
    "undone": "Your last judgement is taken back; judge this one anew.", "undo_nothing": "Nothing to take back.",
    "thumb_undone": "Your last thumb is taken back.", "more": "More", "prompts": "Prompts",
    "lowest": "Lowest first by", "other_branch": "another branch",
    "no_runs": "No folder of runs was named:", "details": "Why, and a better answer (optional)", "role": "Role",
    "account": "Account", "add_account": "Add an account", "new_password": "New password",
    "disable": "Let nobody log in", "not_found": "There is no such page, or it is not yours.",
}  # fmt: skip
ZH = {
    "title": "评判回答", "home": "首页", "chat": "对话", "queues": "待评判", "judge": "评判", "done": "已完成",
    "nothing": "这里没有待评判的内容了。谢谢。", "mine": "由您完成", "of": "/", "at_most": "/ 最多",
    "look": "查看", "admin": "管理",
    "undo": "撤销上一个", "skip": "跳过", "save": "保存", "say": "发送", "message": "您的消息",
    "new_chat": "新对话", "again": "换一个回答", "answer": "回答", "edit": "编辑",
    "edit_send": "发送编辑后的消息", "user": "用户", "assistant": "助手", "system": "系统",
    "left_better": "A 更好", "right_better": "B 更好", "tie": "一样好", "both_bad": "都不好",
    "rank_hint": "1 为最好；相同数字表示并列。", "place": "名次",
    "mark_hint": "在回答中选取文字，再选择标签。没有问题时直接保存。",
    "mark_keys": "用键盘：按 Tab 键进入回答，方向键移动，Shift 加方向键选取。", "marks": "标记", "clear": "清除标记",
    "accept": "接受", "reject": "拒绝", "correction": "更好的回答（可选）", "up": "好回答", "down": "差回答",
    "reasons": "原因（可选）", "r_wrong": "不正确", "r_unclear": "不清楚", "r_unsafe": "有害",
    "r_style": "文风", "r_helpful": "有帮助", "login": "登录", "logout": "退出", "name": "姓名",
    "password": "密码", "wrong": "姓名或密码错误。", "change_name": "更改姓名", "who": "评判人",
    "language": "English", "no_model": "这里没有模型作答；请评判队列。", "no_answer": "还没有回答。",
    "compare_hint": "哪个回答更好？", "retry": "尚未保存：连接已断开，正在重试……", "search": "搜索",
    "lost": "没有收到回答：连接已断开，或服务器出错。您写的内容还在，请再发送一次。",
    "away": "数据库暂时没有响应，因此没有保存。请稍后再试。",
    "logged_out": "您已不在登录状态，因此没有保存。请在另一个标签页重新登录，然后再发送一次。",
    "rater": "评判人", "task": "任务", "seconds": "秒（中位数）", "gold": "检验题正确", "drift": "前半 / 后半",
    "thinking": "模型正在回答……", "busy": "请求过多，请稍候。", "error": "未能完成", "all": "全部",
    "count": "评判数", "forget": "删除", "skip_main": "跳到内容",
    "alpha": "一致性 (Krippendorff alpha，95% 区间)", "items": "条目", "conversations": "对话记录",
    "runs": "训练运行", "run": "运行", "step": "步", "tables": "表", "beside": "并排比较", "beside_pick": "选择",
    "behind": "带链接的数字通向其背后的数据行。", "all_numbers": "此运行的全部数字", "no_rows": "没有匹配的内容。",
    "prompt": "提示",
    "rate_hint": "按数字键可回答第一个未完成的项目。", "select_first": "请先选取文字。",
    "review_hint": "这个回答好吗？如果不好，可以先写出更好的回答再拒绝。",
    "undone": "上一个评判已撤销，请重新评判。", "undo_nothing": "没有可以撤销的内容。",
    "thumb_undone": "上一个评价已撤销。",
    "more": "更多", "prompts": "提示", "lowest": "从低到高", "other_branch": "另一分支",
    "no_runs": "尚未指定训练运行的文件夹：", "details": "原因和更好的回答（可选）", "role": "角色", "account": "账户",
    "add_account": "添加账户", "new_password": "新密码", "disable": "禁止登录",
    "not_found": "没有这个页面，或它不属于您。",
}  # fmt: skip
LANGUAGES = {"en": EN, "zh": ZH}


def language(cookie: str | None, accepts: str) -> str:
    """The language of a page: what was chosen, or else the first one that the browser asks for and that we have."""
    if cookie in LANGUAGES:
        return cookie
    wanted = [part.split(";")[0].strip().lower()[:2] for part in accepts.split(",")]
    return next((one for one in wanted if one in LANGUAGES), "en")
