// The subcommands. Each function adds one to the program; when it is the one that was asked for,
// it runs inside parse and leaves its exit code in `code`: 0 done, 1 failed, 2 wrong usage,
// 128 + n ended by signal n.
#pragma once

namespace CLI {
class App;
}

namespace troupe {

void add_generate(CLI::App& app, int& code);
void add_score(CLI::App& app, int& code);
void add_tokenize(CLI::App& app, int& code);
void add_inspect(CLI::App& app, int& code);
void add_init(CLI::App& app, int& code);
void add_launch(CLI::App& app, int& code);
void add_data(CLI::App& app, int& code);
void add_train(CLI::App& app, int& code);
void add_plan(CLI::App& app, int& code);
void add_plot(CLI::App& app, int& code);

} // namespace troupe
